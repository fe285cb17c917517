"""A stage's own step on made-up data, for scripts/plan.py and scripts/benchmark.py.

sizes.py completes a config, steps.py builds the step, fake.py runs it on tensors without values.
"""

from typing import Any

import yaml


def print_figures(values: dict) -> None:
    """Print nested values as YAML, numbers with four digits."""
    print(yaml.safe_dump(rounded(values), sort_keys=False, default_flow_style=None, width=100))


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
