"""The method on a real model: DINOv2 ViT-S/14."""
