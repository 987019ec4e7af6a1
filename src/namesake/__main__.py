from namesake.cli import main

main()
