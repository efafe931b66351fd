"""Train what the stages keep: decode's blocks, merged ones too, and prefill's projections.

Decode learns on the keys and values that prefill makes, prefill by what decode makes of them; both
from the dense model's word. A stage that does not train stays as its plan has it.
"""
