"""The slim ViT: its table of five numbers a block, its weights, and how channels are cut out of it."""
