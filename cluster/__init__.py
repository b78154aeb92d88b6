"""What an Eagleray cluster is: words, formats and decisions, without Ray, FAISS or HTTP."""
