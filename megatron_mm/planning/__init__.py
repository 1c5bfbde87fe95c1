"""What a recipe needs, before a GPU is bought: memory of each rank, time of a step, the layouts that fit."""
