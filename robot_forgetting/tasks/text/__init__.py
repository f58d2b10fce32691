"""Tasks that are questions in words, one file each."""
