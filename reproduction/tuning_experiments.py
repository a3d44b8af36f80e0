"""The systems that tune weights: their rows and their own tables, as data.

Each system has its own rate per bit width, because Adam moves a number by about rate x steps, and a 4-bit scale is 17 times as
large as an 8-bit one. Steps are the scripts' own, as published.
"""

from __future__ import annotations

from reproduction.declarations import DRIFT, OBEYED, Experiment, PictureGrid, Row, scores
from reproduction.worlds import WITH_MINIATURE_ONLY

PEQA, INT4 = dict(experts=1, no_scale_in=True), dict(bits=4)
# {system: (method, its flags, published learning rate)}
SYSTEMS: dict[str, tuple[str, dict, float]] = {
    "DreamBooth": ("dreambooth", {}, 5e-6),
    "QLoRA": ("qlora", {}, 1e-4),
    "PEQA": ("tuneqdm", PEQA, 3e-6),
    "PEQA, 4 bit": ("tuneqdm", PEQA | INT4, 5e-5),
    "TuneQDM": ("tuneqdm", {}, 3e-6),
    "TuneQDM, 4 bit": ("tuneqdm", INT4, 5e-5),
    "DiffuseKronA": ("diffusekrona", {}, 5e-4),
}
TUNERS = ("DreamBooth", "QLoRA", "PEQA", "TuneQDM", "DiffuseKronA")  # the systems of the paper's tables, and KronA
# multiples of a system's start rate; two systems were best at the lower edge of the grid
GRID_FACTORS = dict.fromkeys(SYSTEMS, (1 / 3, 1.0, 3.0)) | dict.fromkeys(("QLoRA", "TuneQDM, 4 bit"), (1 / 9, 1 / 3, 1.0, 3.0))


def tuned(system: str, label: str = "", published: dict | None = None, against: str | None = None, **flags) -> Row:
    """A row of a system, at the world's rate for that system."""
    method, own, _ = SYSTEMS[system]
    return Row(label or system, own | flags, method, published or {}, rate_of=system, against=against)


def at_published_rate(system: str) -> Row:
    method, own, rate = SYSTEMS[system]
    return Row(f"{system}, published rate", own | dict(learning_rate=rate), method)


TUNER_SCORES = {  # Table 1 and S10
    "DreamBooth": scores(.281, .782, .592, peak_memory_gb=19.4, stored_kb=3_438_000, minutes=2),
    "QLoRA": scores(.297, .762, .607, peak_memory_gb=7.56, stored_kb=1630, minutes=1.1),
    "PEQA": scores(.275, .791, .604, peak_memory_gb=6.31, stored_kb=1320, minutes=1.5),
    "TuneQDM": scores(.289, .788, .555, peak_memory_gb=8.96, stored_kb=2480, minutes=1.4),
}  # fmt: skip
TUNER_ROWS = (
    *(tuned(system, published=TUNER_SCORES.get(system)) for system in TUNERS),
    *(at_published_rate(system) for system in TUNERS),
)
CONFOUND = ("The systems that tune weights are prompted with \"a sks dog in the jungle\", the token methods with \"a <sks> in "
            "the jungle\": the class word is part of what is compared.")  # fmt: skip
WEIGHTS = ("DreamBooth's weights are not quantised, those of QLoRA and DiffuseKronA (factors 4 and 16) are NF4, those of PEQA "
           "and TuneQDM (four experts) 8-bit integers; losses on different weights cannot be compared.")  # fmt: skip
NO_DRIFT = "Drift is measured on pictures of the class word alone, which a token does not change."

INTERVALS = ((0, 250), (250, 500), (500, 750), (750, 1000), (500, 900))  # the last is PUTS's
RATE_FACTORS = (0.2, 0.4, 1.0, 2.0)  # multiples of KronA's rate: 1e-4 to 1e-3 if that is the published one, as in its Fig. 4
SCALES = {"s_out": dict(no_scale_in=True), "s_out and s_in": {}}


def scales_row(bits: int, scales: str, experts: int, published: dict | None = None) -> Row:
    """Scales and experts, at equal steps and at PEQA's rate."""
    system, own = ("PEQA", {}) if bits == 8 else ("PEQA, 4 bit", INT4)
    flags = own | SCALES[scales] | dict(experts=experts)
    return Row(f"{bits} bit, {scales}, N = {experts}", flags, "tuneqdm", published or {}, rate_of=system)


def s_in_row(rate: float) -> Row:
    return Row(f"8 bit, N = 1, s_in at its own rate {rate:g}", dict(experts=1, scale_in_learning_rate=rate), "tuneqdm",
               rate_of="PEQA")  # fmt: skip


def s1_row(low: int, high: int, apply: str) -> Row:
    """One set of scales, trained on an interval of timesteps and applied there or everywhere."""
    flags = dict(experts=1, train_interval=[low, high], apply=apply)
    return Row(f"S1 [{low}, {high}), {apply}", flags, "tuneqdm", rate_of="PEQA")


def factor_row(a1: int, a2: int) -> Row:
    return tuned("DiffuseKronA", f"KronA ({a1}, {a2})", a1=a1, a2=a2)


def kron_rates(system: str) -> tuple[Row, ...]:
    """A system at four rates, the same for KronA and LoRA, and the spread over the four."""
    method, own, _ = SYSTEMS[system]
    rows = tuple(
        Row(f"{system}, {factor:g} x KronA's rate", own, method, rate_of="DiffuseKronA", rate_factor=factor)
        for factor in RATE_FACTORS
    )
    return *rows, Row(f"{system}, spread over the four rates", method=method, spread_of=tuple(row.label for row in rows))


UNTUNED_NF4, UNTUNED_INT8 = Row("untuned, NF4", {}, "untuned"), Row("untuned, 8 bit", {}, "untuned_integers")
UNTUNED_INT4 = Row("untuned, 4 bit", INT4, "untuned_integers")
PEQA_8, PEQA_4 = (
    scales_row(8, "s_out", 1, scores(.300, .824, .581)), scales_row(4, "s_out", 1, scores(.313, .787, .519))
)  # fmt: skip
N1_8, N2_8, N2_OUT_8 = scales_row(8, "s_out and s_in", 1), scales_row(8, "s_out and s_in", 2), scales_row(8, "s_out", 2)
N4_8, N4_4 = (
    scales_row(8, "s_out and s_in", 4, scores(.307, .816, .578)), scales_row(4, "s_out and s_in", 4, scores(.306, .802, .551))
)  # fmt: skip
# experts as in the rows above: if the two rates are the same, so are the runs
OWN_8, OWN_4 = (tuned(system, f"{bits} bit, N = 4, its own rate", experts=4) for system, bits in (("TuneQDM", 8),
                                                                                             ("TuneQDM, 4 bit", 4)))  # fmt: skip
S1_OF_PUTS = s1_row(500, 900, "interval")
TUNING_COLUMNS = ("attributes", *OBEYED, "CLIP-I", "DINO", "CLIP-T", *DRIFT, "loss", "loss_all")
SHOWN = ("a {} in the snow", "a {} on the beach", "a {} wearing a santa hat")  # on the sheets

TUNING_EXPERIMENTS = (
    Experiment("TuningRates", "Learning rates of weight tuning", tuple(
        Row(f"{system}, {factor:.2g} x", own, method, rate_of=system, rate_factor=factor, of_grid=True)
        for system, (method, own, _) in SYSTEMS.items() for factor in GRID_FACTORS[system]
    ), ("attributes", *OBEYED, *DRIFT, "CLIP-I", "CLIP-T", "loss", "loss_all"), worlds=WITH_MINIATURE_ONLY, on_request=True,
        chooses_rates=True,
        note="On two spare breeds, on which nothing else is reported. The choice is made by pictures: by the sum of the shares "
             "of attributes, scenes and accessories that are right. The loss plays no part in it."),
    Experiment("Tuning", "The five systems that tune weights", (
        UNTUNED_NF4, UNTUNED_INT8, *(tuned(system) for system in TUNERS),
    ), TUNING_COLUMNS, on_request=True,
        plot=PictureGrid("tuning.jpg", {"untuned": "untuned, NF4"} | {system: system for system in TUNERS}, SHOWN),
        note="Every photograph has the prompt \"a photo of sks\" followed by its class. Drift is measured on pictures of the "
             "class word alone; the untuned rows show how much of it is chance. " + WEIGHTS),
    Experiment("Prompts", "Captions and prior preservation in weight tuning", (
        *(row for system in TUNERS
          for row in (tuned(system), tuned(system, f"{system}, captions", against=system, use_cc=True))),
        *(tuned(system, f"{system}, prior preservation, {steps} steps", against=system, prior_preservation=True,
                num_class_images=64, max_train_steps=steps)
          for system, steps in (("DreamBooth", 400), ("DreamBooth", 800), ("QLoRA", 500), ("QLoRA", 1000))),
    ), TUNING_COLUMNS, on_request=True, breeds=4,
        note="Without captions every photograph has the prompt \"a photo of sks\" followed by its class."),
    Experiment("TuneQDM", "The claims of its paper", (
        UNTUNED_INT8, PEQA_8, N2_OUT_8, N1_8, N2_8, N4_8, OWN_8, s_in_row(1e-3), S1_OF_PUTS,
        UNTUNED_INT4, PEQA_4, N4_4, OWN_4,
    ), (*TUNING_COLUMNS, "travel", "trained"), on_request=True,
        plot=PictureGrid("tuneqdm.jpg", {"untuned": "untuned, 8 bit", "PEQA": PEQA_8.label, "N = 1": N1_8.label,
                                         "N = 4": N4_8.label, "S1": S1_OF_PUTS.label, "4 bit, PEQA": PEQA_4.label,
                                         "4 bit, N = 4": N4_4.label}, SHOWN),
        note="All rows have equal steps, as published. Rows of the same bit width have one rate, PEQA's, except for two: they "
             "have TuneQDM's own rate, and share the runs of the rows above if it is the same. Rate x steps / median scale shows "
             "how far Adam can move a scale. s_in at its own rate has no weight decay and is our own addition. The sources do "
             "not say what S1 does outside its interval: \"interval\" leaves the untuned scales there. The published figures are "
             "one subject's, and their DINO is not DINOv2."),
    Experiment("Scales", "Scales, experts, bits and S1 of TuneQDM", (
        *(scales_row(bits, scales, experts) for bits in (8, 4) for scales in SCALES for experts in (1, 2, 4)),
        *(Row(f"8 bit, s_out and s_in, N = {experts}, {400 * experts} steps",
              dict(experts=experts, max_train_steps=400 * experts), "tuneqdm", rate_of="PEQA") for experts in (2, 4)),
        *(s_in_row(rate) for rate in (1e-4, 1e-3, 1e-2)),
        *(s1_row(low, high, apply) for low, high in INTERVALS for apply in ("interval", "everywhere")),
    ), (*TUNING_COLUMNS, "travel"), on_request=True, breeds=4, against=PEQA_8.label,
        note="The whole grid, on four breeds. N experts share the steps, so two rows have as many steps per expert as N = 1."),
    Experiment("KronA", "DiffuseKronA compared with LoRA", (
        UNTUNED_NF4, factor_row(4, 64), factor_row(4, 16), factor_row(8, 64),
        tuned("QLoRA", "LoRA r = 2"), *kron_rates("DiffuseKronA"), *kron_rates("QLoRA"),
    ), (*TUNING_COLUMNS, "trained"), on_request=True,
        plot=PictureGrid("krona.jpg", {"untuned": "untuned, NF4", "KronA (4, 64)": "KronA (4, 64)",
                                       "KronA (4, 16)": "KronA (4, 16)", "KronA (8, 64)": "KronA (8, 64)",
                                       "LoRA": "LoRA r = 2"}, SHOWN),
        note="LoRA r = 2 has as many parameters as (4, 64) in Stable Diffusion v1.5; on the miniature (8, 64) is nearest to "
             "it, and the rows at four rates are of (4, 16), which has fewer (last column) and whose run is the row "
             "\"DiffuseKronA, 1 x\". QLoRA is LoRA r = 2 too. Rows of the spread over the four rates give the standard "
             "deviation of each score over them, as a mean over breeds. The four rates are the same for both systems, "
             "around KronA's. KronA's paper uses another model, other subjects and another DINO (Stable Diffusion v1.4, 12 "
             "subjects; CLIP-I, CLIP-T, DINO: LoRA .808, .260, .710, (8, 64) .822, .269, .732)."),
    Experiment("Factors", "Kronecker factors of DiffuseKronA", (
        *(factor_row(a1, 64) for a1 in (2, 4, 8, 16)), *(factor_row(a1, 16) for a1 in (2, 4)),
    ), (*TUNING_COLUMNS, "trained"), on_request=True, breeds=4, against="KronA (4, 64)"),
)  # fmt: skip
