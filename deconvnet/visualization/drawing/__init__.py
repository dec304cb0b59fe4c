"""Pictures as tensors: tiles, captions, sheets and charts, whatever they show."""
