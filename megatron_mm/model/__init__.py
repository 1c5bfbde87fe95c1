"""The model: ViT encoder, connector, Megatron-Core decoder, and their composition. It knows nothing of files."""
