"""The main job: train a language model on real text, without and with this library, and compare. `make demo`."""
