"""Base models: the places they come from (``sources``), GGUF files (``gguf``), and model folders (``folder``)."""
