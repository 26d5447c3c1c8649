"""Words with two senses: for each a gloss and sentences, as a table. `{n}` is a name."""

_TABLE = """
bank
  edge of a river
    {n} fished from the bank
    the boat hit the muddy bank
    reeds grew along the bank
    {n} swam to the far bank
  house for money
    {n} asked the bank for a loan
    the bank held the cash of {n}
    {n} opened an account at the bank
    thieves robbed the bank
bat
  flying animal
    a bat slept in the cave
    the bat flew after moths
    {n} saw a bat hang from the roof
    the bat spread its wings
  club for a ball
    {n} swung the bat at the ball
    the bat was made of ash wood
    {n} hit the ball with the bat
    the player gripped the bat
bark
  skin of a tree
    {n} peeled the bark off the oak
    moss covered the bark
    the bark of the birch is white
    beetles live under the bark
  sound of a dog
    the bark of the dog woke {n}
    {n} heard a loud bark
    the puppy gave a short bark
    a bark came from the kennel
spring
  time of year
    flowers bloom in spring
    {n} plants seeds in spring
    the snow melts in spring
    spring follows winter
  coil of metal
    the spring in the clock broke
    {n} oiled the rusty spring
    the spring of the mattress squeaked
    {n} pressed down the spring
match
  small stick for fire
    {n} lit the candle with a match
    {n} struck a match in the dark
    the match burned his finger
    a wet match gives no flame
  game of sport
    the team won the match
    {n} scored twice in the match
    rain stopped the match
    the crowd cheered at the match
seal
  animal of the sea
    the seal dived for fish
    a seal rested on the ice
    {n} fed the seal at the zoo
    the seal swam round the ship
  stamp of wax
    {n} broke the seal of the letter
    the king pressed his seal into the wax
    the deed bears a seal
    the seal on the scroll was red
crane
  bird with long legs
    the crane stood in the marsh
    a crane built its nest
    the crane ate a frog
    {n} watched a crane dance
  machine that lifts
    the crane lifted the steel beams
    {n} drove a crane at the site
    the crane unloaded the ship
    the cable of the crane snapped
trunk
  stem of a tree
    {n} leaned on the trunk of the oak
    ivy climbed up the trunk
    the trunk was hollow with age
    {n} sawed through the trunk
  nose of an elephant
    the elephant raised its trunk
    {n} saw the trunk spray water
    the calf curled its trunk
    the elephant picked nuts with its trunk
nail
  pin of iron
    {n} hammered a nail into the wall
    the picture hung from a nail
    a rusty nail held the plank
    {n} pulled the bent nail out
  end of a finger
    {n} bit her nail
    {n} painted each nail pink
    he broke a nail on his thumb
    the nail of her toe was sore
palm
  tree of warm lands
    coconuts fell from the palm
    the palm swayed on the island
    {n} sat in the shade of a palm
    a palm grew in the desert
  inside of a hand
    {n} held a coin in his palm
    she read the lines of my palm
    {n} wrote a number on her palm
    sweat covered his palm
letter
  sign of writing
    the word starts with the letter b
    {n} spelled it letter by letter
    the last letter is a vowel
    the child learned a new letter
  message by post
    {n} posted a letter to her aunt
    the letter came in an envelope
    {n} read the letter from abroad
    the postman brought a letter
note
  sound in music
    the singer held the high note
    {n} played a wrong note
    the last note of the tune was soft
    the choir missed a note
  short message
    {n} left a note on the fridge
    the note said come home
    {n} wrote a note to the nurse
    a note was pinned to the door
plant
  living green thing
    {n} watered the plant
    the plant has green leaves
    the plant needs light and soil
    {n} put the plant in a pot
  place where things are made
    the plant makes cars
    workers at the plant went on strike
    {n} runs the steel plant
    smoke rose from the plant
wave
  moving water
    a wave hit the ship
    the surfer rode the wave
    the wave broke on the shore
    {n} jumped over a wave
  greeting of the hand
    {n} gave a wave from the window
    she answered with a wave
    a friendly wave greeted {n}
    the queen smiled with a wave
ruler
  stick for measuring
    {n} drew a line with a ruler
    the ruler is marked in inches
    {n} measured the paper with a ruler
    a wooden ruler lay by the pencil
  head of a land
    the ruler taxed his people
    the ruler sat on the throne
    {n} served a cruel ruler
    the army obeyed the ruler
mouse
  small animal
    the cat caught a mouse
    a mouse ate the cheese
    {n} found a mouse in the barn
    the mouse ran into its hole
  part of a computer
    {n} clicked with the mouse
    the mouse is next to the keyboard
    {n} plugged in the mouse
    the screen follows the mouse
"""


def _read(table: str) -> dict[str, dict[str, tuple[str, ...]]]:
    senses: dict[str, dict[str, tuple[str, ...]]] = {}
    word = gloss = ""
    for line in table.strip("\n").splitlines():
        text = line.strip()
        match (len(line) - len(text)) // 2:
            case 0:
                word, senses[text] = text, {}
            case 1:
                gloss, senses[word][text] = text, ()
            case _:
                senses[word][gloss] += (text,)
    return senses


SENSES = _read(_TABLE)  # word → gloss → sentences
