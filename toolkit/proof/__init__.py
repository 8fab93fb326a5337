"""The proofs: that what is served is what was trained."""
