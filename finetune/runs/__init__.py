"""A run: its folder, settings, module registry, metrics, pictures, checkpoints, display, and the typed reader."""
