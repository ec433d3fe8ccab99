"""Reference tasks: what a sample's influence is measured on."""
