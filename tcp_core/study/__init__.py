"""The study: comparators, declared experiments, their runs, and the tables and figures made of them."""
