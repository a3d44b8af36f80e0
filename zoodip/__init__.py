"""What the trainers of this project share: photographs, prompts, a frozen quantised model, and a run.

`train_zoodip.py` and `trainers/` are scripts built on it, each with its own method. `weight_tuning.py` is the loop of trainers
that tune weights, and `binding.py`, with its modules, draws prompts and trains nothing. Functions take named values, never an
argparse Namespace. Importing it loads nothing; each module imports the heavy libraries where it needs them.
"""
