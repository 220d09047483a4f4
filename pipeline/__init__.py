"""From a dense model to a slim one: one room a concern, see `docs/developers.md`."""
