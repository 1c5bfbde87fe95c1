"""Few-shot evaluation of exported models, always with its controls. Start at `vqa.evaluate_vqa`."""
