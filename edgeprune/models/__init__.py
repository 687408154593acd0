"""Language models that can be run as circuits."""
