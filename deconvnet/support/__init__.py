"""Support code for all other folders: argument checks, scaling, torch modes, processes, compiled
loops and renamed settings.
"""
