"""The bundled demo model: how it was trained, and where it lies."""
