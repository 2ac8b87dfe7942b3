pytest_plugins = ["attnplan.testing.plugin"]
