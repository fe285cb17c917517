"""Measurements of trained parts. Import `from eval.x import y`: `import eval` hides a builtin."""
