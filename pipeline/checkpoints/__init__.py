"""Whatever people bring, made a dense timm ViT."""
