"""The measuring measured, against instruments of others."""
