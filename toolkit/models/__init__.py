"""Base models: where they come from (``sources``), GGUF files (``gguf``), folders (``folder``)."""
