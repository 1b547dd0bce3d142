"""Teacher, student and tokenizer from a section of YAML."""
