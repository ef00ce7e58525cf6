//! Plans as text, from YAML.
