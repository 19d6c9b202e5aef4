"""Layers and images as container engines exchange them: export, import, commit. Works on directories, with or without a mount."""
