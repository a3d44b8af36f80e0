"""Methods other than ZOODiP, one script each, built on the same package and run. No trainer imports another."""
