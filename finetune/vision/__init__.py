"""Seeing: the vision transformer, checkpoints of CLIP and SigLIP, their preprocessing, and pictures with questions."""
