"""The commands of `lowpass`, by what they are for. Heavy imports wait until one runs, so that `--help` is quick."""
