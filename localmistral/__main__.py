from localmistral.cli import main
