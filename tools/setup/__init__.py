"""The set-up of everything that the tests and the demo need, and the run of the tests."""
