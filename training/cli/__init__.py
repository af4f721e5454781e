"""The command line: verbs, and their options from the settings' classes."""
