"""Our layers inside the models of other libraries."""
