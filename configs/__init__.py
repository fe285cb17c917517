"""Experiments (folders of YAML files, one a stage), their typed schema, and the loader."""
