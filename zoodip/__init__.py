"""What the trainers of this project share: photographs, prompts, a frozen quantised model, and a run.

The package contains no method: `train_zoodip.py` and `trainers/` are scripts built on it. Its functions take named values, never
an argparse Namespace. Importing it loads nothing; each module imports the heavy libraries where it needs them.
"""
