"""Networks and their training: the only place that imports torch. Imports nothing by itself."""
