"""A person reads the knowledge texts of a round before they are trained on."""
