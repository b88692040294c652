"""Post-deploy verification: pytest tests/verify --inventory inventories/prod"""
