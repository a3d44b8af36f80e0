"""Other methods than ZOODiP, one script each, over the same package and run. No trainer imports another."""
