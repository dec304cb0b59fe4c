"""Restoration of images with the filters of a network: denoising and inpainting."""
