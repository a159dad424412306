"""Loop of molecular dynamics on the device: state, steps, records and compiled programs."""
