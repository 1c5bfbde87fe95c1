"""The model: ViT encoder, C-Abstractor, Megatron-Core decoder, and their composition. It knows nothing of files."""
