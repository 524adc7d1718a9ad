"""What fine-tuning is for, in numbers: protocols, scores, tables and pictures of results."""
