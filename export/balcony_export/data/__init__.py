"""Files as documents, and documents as rows of tokens."""
