"""The field's datasets into this repository's jsonl, a command each: docs/data.md."""
