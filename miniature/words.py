"""The words of the miniature's world, and the colours that some of them stand for."""

from __future__ import annotations

from functools import lru_cache

Rgb = tuple[int, int, int]

CLASS_NOUN = "critter"
SHAPES = ("chubby", "boxy", "tall", "stretched")
COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "orange": (246, 132, 24),
    "yellow": (250, 216, 48),
    "green": (58, 168, 66),
    "blue": (46, 96, 222),
    "purple": (134, 58, 188),
    "pink": (252, 150, 192),
    "brown": (126, 76, 40),
    "grey": (142, 144, 150),
    "white": (245, 245, 242),
    "black": (44, 44, 50),
}
# Far apart in RGB, yet hard to tell apart as a pattern and its background at 64 px.
CONFUSING_PAIRS = ({"red", "purple"}, {"grey", "black"})
PATTERNS = ("plain", "spotted", "striped", "patched")
EARS = ("pointed", "floppy", "round", "long")
TAILS = ("no", "bushy", "thin", "puffy")
EYES: dict[str, Rgb] = {"black": (24, 24, 28), "blue": (40, 130, 255), "green": (30, 190, 70), "amber": (255, 150, 0)}
ACCESSORIES = ("nothing", "red hat", "santa hat", "rainbow scarf", "pink glasses", "yellow shirt")
SCENE_PHRASES: dict[str, tuple[str, ...]] = {
    "grass": ("on the grass", "in the grass", "on green grass"),
    "snow": ("in the snow",),
    "beach": ("on the beach", "on a beach"),
    "forest": ("in the forest", "in a forest", "in the jungle"),
    "wooden floor": ("on top of a wooden floor", "on a wooden floor"),
    "pink fabric": ("on top of pink fabric", "on pink fabric"),
    "purple rug": ("on top of a purple rug", "on a purple rug"),
    "blue house": ("with a blue house in the background",),
    "city": ("with a city at night in the background", "with a city in the background", "in the city at night"),
    "mountain": ("with a mountain in the background",),
    "desert": ("in the desert",),
    "cobblestone street": ("on a cobblestone street", "on top of a cobblestone street"),
}
SCENES = tuple(SCENE_PHRASES)
ACCESSORY_PHRASES: dict[str, tuple[str, ...]] = {
    "nothing": ("",),
    "red hat": ("wearing a red hat", "with a red hat"),
    "santa hat": ("wearing a santa hat", "with a santa hat"),
    "rainbow scarf": ("wearing a rainbow scarf", "with a rainbow scarf"),
    "pink glasses": ("wearing pink glasses", "with pink glasses"),
    "yellow shirt": ("wearing a yellow shirt", "in a yellow shirt"),
}
# The object templates of textual inversion (Gal et al. 2022), so that the words of its prompts are known.
TEMPLATES = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}",
    "a photo of a clean {}", "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}",
    "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}", "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}",
    "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}",
    "a good photo of a {}", "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}",
    "a photo of the large {}", "a photo of a cool {}", "a photo of a small {}", "a picture of a {}",
    "an image of a {}",
)  # fmt: skip


@lru_cache(maxsize=1)
def caption_words() -> tuple[str, ...]:
    """Every word that captions use, except breed names, sorted."""
    texts = [phrase for phrases in SCENE_PHRASES.values() for phrase in phrases]
    texts += [phrase for phrases in ACCESSORY_PHRASES.values() for phrase in phrases]
    texts += [template.replace("{}", " ") for template in TEMPLATES]
    texts += [*SHAPES, *COLOURS, *PATTERNS, *EARS, *TAILS, *EYES, CLASS_NOUN]
    texts.append("spots stripes patches ears tail eyes and with critters an animal")
    return tuple(sorted({word for text in texts for word in text.replace("-", " ").split()}))
