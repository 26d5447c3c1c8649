"""Reading and writing of models and runs."""
