"""What the trainers of this project share: photographs, prompts, a frozen quantised model that predicts, and a run.

The package knows no method: `train_zoodip.py` and `trainers/` are scripts over it. Its functions take named values, never
an argparse Namespace. Importing it loads nothing; each module imports the heavy libraries where it needs them.
"""
