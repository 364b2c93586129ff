"""Text: the frozen T5 v1.1 encoder, its tokenizer, and reading its published weights without torch."""
